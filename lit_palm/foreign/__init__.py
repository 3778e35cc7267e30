"""What other tools wrote: readers of their files, which never run code that comes with them."""
