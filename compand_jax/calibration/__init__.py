"""mu and scale of arrays, without a model."""
