"""Side-by-side measurements of asyncckpt and what it is compared with: `python -m benchmarks`."""
