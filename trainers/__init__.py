"""Training methods, one runnable file each: `accelerate launch trainers/NAME.py`."""
