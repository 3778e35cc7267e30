"""Networks spread over processes: sharded by block, split within blocks, and kept in step. Pure torch, no Lightning."""
