"""The adapted layers: a frozen weight, its adapter, and one forward."""
