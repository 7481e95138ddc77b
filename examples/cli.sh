#!/usr/bin/env bash
# Tune from the command line: give the model's folder or hub id as the first argument.
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:-sentence-transformers/all-MiniLM-L6-v2}
parts="--config configs/tasks/text_classification.yaml --config configs/data/stdlib_docstrings.yaml"

lightning-peft fit $parts --model.model "$model" --config configs/methods/bitfit.yaml --trainer.max_steps 20
lightning-peft fit $parts --model.model "$model" --method PromptTuning --method.num_virtual_tokens 8 --trainer.max_steps 20
lightning-peft methods
