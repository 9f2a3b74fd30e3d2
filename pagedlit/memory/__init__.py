"""Who owns which block of the KV cache: allocation, block tables, copy-on-write, prefix cache. Standard library only."""
