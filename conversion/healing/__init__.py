"""What `conversion.heal` is made of: distillation of a converted checkpoint from the LLaMA it came from."""
