"""What happens to the tensors: KV cache, paged attention, sampler, model runner. Needs torch and transformers."""
