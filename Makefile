# make demo   the article's experiment on a text whose entropy is known, in minutes on a laptop
# make test   all tests
# Both make their own virtual environment in .venv.

PYTHON ?= python3
PY := .venv/bin/python
STUDY := results/demo

# toyworld-sized: the recipe's learning-rate law and batch were fitted to models 50 times as large
DEMO := --data toyworld --depth 4 --width 128 --max_seq_len 128 --seq_len 128 --batch_tokens 4096 --micro_batches 1 \
        --lr 0.004 --lr_mult_embedding 8 --weight_decay 0.1 --epochs none --tokens 1.6e6 --eval_every none --eval_epochs 0.4

.PHONY: demo test

demo: .venv/installed
	$(PY) data/prepare.py toyworld
	$(PY) train.py --study $(STUDY) $(DEMO) --seed 100 101 --p_bw 0 0.05
	$(PY) eval_layers.py $(STUDY)
	$(PY) plot_results.py $(STUDY)

test: .venv/installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist worksteal

.venv/installed: requirements.txt $(wildcard experiments/requirements.txt)
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check $(addprefix -r ,$^)
	touch $@
