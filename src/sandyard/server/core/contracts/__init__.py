"""The seams of the house: what one room asks of another without knowing who answers.

Split by who is asked. `app` alone decides what stands behind each. Every implementation of one
passes the same examination under `tests/contract`.
"""
