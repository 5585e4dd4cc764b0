"""A BERT sentence encoder, such as all-MiniLM-L6-v2, in Linen and in NNX, with public weights."""
