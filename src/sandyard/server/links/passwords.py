"""Password hashes that are also valid in a guest's shadow file (bcrypt, `$2b$`)."""

import asyncio

import bcrypt

_NOBODYS = "$2b$10$mYakqsJTX89O7IHr2vV73.2JtysL/R92S31TQZv13aJHlQ8VyfcMy"  # of an unknown secret


async def hash_password(password: str) -> str:
    """Return the hash of a password of 8 to 72 bytes; deliberately takes a large part of a
    second."""
    hashed = await asyncio.to_thread(bcrypt.hashpw, password.encode(), bcrypt.gensalt(10))
    return hashed.decode()


async def check_password(password: str, hashed: str | None) -> bool:
    """Tell whether a password matches a hash; takes equally long if there is no hash."""
    secret = password.encode()[:72]
    found = await asyncio.to_thread(bcrypt.checkpw, secret, (hashed or _NOBODYS).encode())
    return found and hashed is not None
