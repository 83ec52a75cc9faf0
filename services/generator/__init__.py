"""Makes synthetic images from a teacher's BatchNorm statistics, alone or together with a student."""
