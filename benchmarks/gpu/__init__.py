"""``make gpu-check``: what a machine's GPU does with these models, against what its memory and arithmetic allow."""
