"""Answers for envd, the daemon that clients of E2B expect in each sandbox at port 49983.

Nothing of it runs in the sandbox: messages are translated to operations of our agent. Source of the
messages: the .proto files and the OpenAPI description in `spec/envd` of E2B's repository.
"""
