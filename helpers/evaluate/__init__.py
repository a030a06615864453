"""01: hf-dialogue, the lm-eval model that prefills every dialogue once, and the runs of lm-eval with it."""
