"""Other systems on the same work, each built from its description: what ours is measured beside.

One file a system; docs/peers.md has the figures and what differs from each original.
"""
