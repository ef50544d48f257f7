"""Starts the server of the code interpreter."""

import asyncio

from code_interpreter.server import main

asyncio.run(main())
