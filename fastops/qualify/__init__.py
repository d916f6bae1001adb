"""What ``fastops qualify`` runs on a GPU: its parts, each a list of cases, and the processes that they run in."""
