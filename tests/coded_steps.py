"""Random steps over an eight-bit cache, made from those of test_attention: what is in the cache is what the oracle sees."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from test_attention import Step, make_step
from torch import Tensor

from pagedlit.compute.attention import get_backend
from pagedlit.compute.kv_cache import split_kv
from pagedlit.compute.quantize import E4M3, decode, encode

SCALES = torch.tensor([[2.0**-5, 2.0**-7], [0.25, 2.0**-6]])  # of K and of V, for two heads


@dataclass
class CodedStep(Step):
    """A step whose cache holds codes; slots that nobody wrote hold the code of NaN."""

    scales: tuple[Tensor, ...] = ()  # of K and of V, or nothing

    def run(self, backend: str, **options: object) -> Tensor:
        """The backend's answer over a copy of the cache."""
        return self.run_over([cache.clone() for cache in self.kv_cache], backend, **options)

    def run_over(self, kv_cache: list[Tensor], backend: str, **options: object) -> Tensor:
        """The backend's answer; the cache is changed in place."""
        scales = dict(zip(("key_scales", "value_scales"), self.scales))
        return get_backend(backend)(self.query, self.key, self.value, kv_cache, self.metadata, options.pop("scale", 0.3), **options, **scales)


def make_coded_step(lengths: list[tuple[int, int]], scales: Tensor | None = SCALES, **shape: object) -> CodedStep:
    """As `make_step`. The sequences of the oracle are what codes and scales stand for, the new tokens as well."""
    step = make_step(lengths, **shape)
    key_scales, value_scales = (None, None) if scales is None else scales
    kv_cache = [torch.full_like(cache, torch.nan, dtype=E4M3) for cache in step.kv_cache]
    for plain, coded, of in zip(split_kv(step.kv_cache), split_kv(kv_cache), (key_scales, value_scales)):
        coded.copy_(encode(plain.transpose(1, 2).flatten(0, 1), of).unflatten(0, (len(plain), -1)).transpose(1, 2))
    keys, values = ([decode(encode(x, of), of) for x in rows] for rows, of in ((step.keys, key_scales), (step.values, value_scales)))
    fields = vars(replace(step, kv_cache=kv_cache, keys=keys, values=values))
    return CodedStep(**fields, scales=() if scales is None else (key_scales, value_scales))


def same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    """Are two eight-bit caches the same, NaN included?"""
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, second))
