"""02: prefill, decode, memory, throughput and their limits."""
