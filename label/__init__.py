"""Says what the features of a dictionary encode, and what the model does with them."""
