"""Which tensors a model is made of, and what becomes of each: rules, and the stream that applies them."""
