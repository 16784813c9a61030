"""Parameter groups, fused AdamW, and schedules as pure functions of the update number."""
