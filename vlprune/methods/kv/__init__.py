"""Methods that evict from the KV cache, most of them configurations of one policy."""
