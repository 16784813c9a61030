"""Settings of a model that trains in seconds: overrides of the preset `base`."""

MICRO_ENCODER = (
    "model.conv_layers=[[16,10,5],[16,3,2],[16,3,2],[16,3,2],[16,3,2],[16,2,2],[16,2,2]]",
    "model.conv_norm_groups=16",
    "model.layers=3",
    "model.dim=32",
    "model.ffn_dim=64",
    "model.heads=4",
    "model.positional_groups=4",
)
"""An encoder of about 40,000 parameters, with BASE's dropouts, for any objective."""

THREE_CONVOLUTIONS = "model.conv_layers=[[16,10,5],[16,8,8],[16,8,8]]"
"""With the stride of the seven above, and fewer kernels to compile."""

MICRO_MODEL = (
    *MICRO_ENCODER,
    "objective.codebook_entries=16",
    "objective.codevector_dim=16",
    "objective.projection_dim=16",
    "objective.negatives=20",
)
"""The encoder with wav2vec 2.0 pretraining."""

MICRO_TRAINING = (
    "regularization.layerdrop=0.3",
    "data.max_seconds=2.0",
    "data.min_seconds=0.5",
    "data.workers=0",
    "batch.max_seconds=8.0",
    "batch.micro_batches=4",
    "optim.lr=1e-3",
    "schedule.warmup_updates=4",
    "precision.compute=fp32",
    "logging.every=1",
    "logging.tensorboard=false",
    "logging.samples_every=0",
    "logging.histograms_every=0",
    "trainer.updates=12",
)
"""A run of seconds, with a LayerDrop that skips many blocks."""

MICRO_RUN = (*MICRO_MODEL, *MICRO_TRAINING)

SMALL = (
    "model.conv_layers=[[32,10,5],[32,3,2],[32,3,2],[32,2,2]]",
    "model.conv_norm_groups=32",
    "model.layers=3",
    "model.dim=48",
    "model.ffn_dim=96",
    "model.heads=4",
    "model.positional_kernel=16",
    "model.positional_groups=4",
    "objective.codebook_entries=20",
    "objective.codevector_dim=24",
    "objective.projection_dim=24",
    "objective.negatives=30",
)
"""Makes of any preset a model that other libraries have too and that runs in milliseconds."""
