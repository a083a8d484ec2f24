"""What the library costs: every op against its limits and its rivals, in one run on one machine."""
