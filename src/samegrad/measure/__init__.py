"""What a step holds: counted tensor bytes on any device, and the CUDA allocator's own counters."""
