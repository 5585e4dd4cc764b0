"""NNX models as packed codes: a model of the same class, whose layers expand them."""
