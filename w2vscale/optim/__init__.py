"""Parameter groups, fused AdamW, and learning-rate schedules as pure functions of the update number."""
