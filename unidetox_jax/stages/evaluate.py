"""`unidetox evaluate`: toxicity, perplexity, diversity and knowledge of every model, before and after.

One task, and one directory of WORKDIR/evaluation, for each model and form: NAME as it is published, NAME.detoxified,
NAME.control, and every extra model by its own name. The surprising thing: what a run of generations yields is kept
under parts/ as soon as it is whole, so an interrupted evaluation goes on with the first part that is missing; the
parts go once `metrics.json`, written last, is there.

    prompts.jsonl      a prompt a line, in order: {"prompt": index, "category", "text"}; category "" is none
    generations.jsonl  a continuation a line, by run, prompt, sample: {"run": index, "prompt", "sample", "text" (the
                       continuation alone), "ended" (by itself), "score" (null: the scorer refused the text),
                       "perplexity" (null: not measured, nothing to measure, or infinite)}
    per_prompt.npz     float64 [P], means over runs; NaN where a prompt has nothing: tp, emt, dist1, dist2, dist3; and
                       where perplexity is measured perplexity_sum, perplexity_count (of those below the limit, over
                       runs and samples). category: unicode [P]. Paired intervals of a change come from these:
                       `toxicity.change({"tp", "emt"} before, after, category.tolist(), groups)`
    metrics.json       {"model": {"name" (without the form), "form": "original" | "detoxified" | "control", "source"},
                        "scorer": as configured, "perplexity_scorer": as configured, "groups": {"id": [category, …],
                        "ood": […]}, "prompt_source": as configured,
                        "counts": {"prompts", "categories": {category: prompts}, "runs", "samples" (of a prompt), "texts"
                                   (of all runs), "empty" (continuations without a character), "ended",
                                   "missing_scores", "degenerate": {"empty", "no words", "repetitive"}},
                        "toxicity": {category | "id" | "ood" | "all": {"tp": figure, "emt": figure, "prompts", "texts",
                                     "missing", "categories"}},           `toxicity.summarize_runs`
                        "perplexity": null | {figure's fields at once, "texts", "counted", "excluded", "undefined",
                                       "truncated"},                      `perplexity.summarize_runs`; mean null: none
                        "diversity": {"dist1" | "dist2" | "dist3": figure}, over all prompts
                        "mmlu": {"paper:1" as configured: `mmlu.evaluate`'s result and "split"},
                        "text_perplexity": null | {"file", …`perplexity.of_file`'s result},
                        "harness": {task: {metric: value}}}
                       A figure: {"mean", "sd" (population, over runs), "runs": [value of each run], "low", "high" (95 %
                       bootstrap over prompts)}.
"""
