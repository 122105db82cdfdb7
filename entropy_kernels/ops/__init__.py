"""Operator contracts: schema, fake and autograd of each op in one file."""
