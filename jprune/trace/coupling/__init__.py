"""Which axes of the parameters can only be removed together."""
