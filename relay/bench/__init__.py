"""How fast the relay is, measured on the machine at hand: what `relay bench` runs.

Every process of a measurement is a child with its own CPU seconds: what feeds, what is measured and what that is
compared with never share one.
"""
