"""What a model computes and how near it is to another one."""
