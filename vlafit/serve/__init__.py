"""Serve an actor over websockets, and act through such a server as if the policy were here.

`vlafit.serve.server` serves, `vlafit.serve.client` connects, `vlafit.serve.control` drives a robot with
either. The client's side imports no torch.
"""
