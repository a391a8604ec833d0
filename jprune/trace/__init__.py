"""One walk of the jaxpr: every matmul against a parameter, what feeds it and what depends on it."""
