"""What a program will need on devices that need not be there: memory, time and traffic, from the compiler's reports.

`codi_jax.planning.targets` opens a target, `codi_jax.planning.programs` compiles for it, `codi_jax.planning.hlo` reads
what the compiler made, `codi_jax.planning.plan` draws the conclusions. What is compiled comes from elsewhere: a
training step from `codi_jax.training.planned`, sampling from `codi_jax.pipeline`.
"""
