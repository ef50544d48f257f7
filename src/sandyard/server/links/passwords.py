"""Password hashes that a guest's shadow file understands as well (bcrypt, `$2b$`)."""

import asyncio

import bcrypt


async def hash_password(password: str) -> str:
    """Return the hash of a password of 8 to 72 bytes; takes a good part of a second by design."""
    hashed = await asyncio.to_thread(bcrypt.hashpw, password.encode(), bcrypt.gensalt(10))
    return hashed.decode()
