"""The seams: interfaces between rooms, one module for each kind of provider.

Only `app` chooses the implementations. All implementations of a seam pass the same tests under
`tests/contract`.
"""
