"""A cluster on a virtual clock: the router's own policies over modelled workers.

What decides is the product's code, unchanged; what computes is replaced by its measured cost.
"""
