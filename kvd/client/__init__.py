"""The client: what engines and tools use to store and load chunks."""

from kvd.client.aio import AsyncClient, connect_async
from kvd.client.client import Client, connect
from kvd.client.lease import Lease, Reservation

__all__ = ["AsyncClient", "Client", "Lease", "Reservation", "connect", "connect_async"]
