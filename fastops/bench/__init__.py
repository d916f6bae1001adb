"""What ``fastops bench`` times: its cases, the contestants, what is measured and counted, and the page about it."""
