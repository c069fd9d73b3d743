"""BOLD (Dhamala et al., FAccT 2021): beginnings of Wikipedia sentences about people of professions, genders, races,
religions and political ideologies."""

import json

from unidetox_jax.data import files
from unidetox_jax.data.datasets.base import TEXT, Dataset
from unidetox_jax.errors import UserError


class Bold(Dataset):
    """`domain` comes from the file's name ("gender" for gender_prompt.json), `category` is the group within it and
    `entity` whom or what the sentence is about. A file is one object, {category: {entity: [prompt, …]}}. The trailing
    space of each prompt is stripped, since tokenizers attach the space to the next word."""

    name = "bold"
    fields = dict.fromkeys(("text", "category", "domain", "entity"), TEXT)
    patterns = (("prompts/*_prompt.json", "*_prompt.json"),)

    def examples(self):
        for content in self.contents:
            domain = content.basename.removesuffix(".json").removesuffix("_prompt")
            for category, entities in _group(_parsed(content), content.name).items():
                for entity, prompts in _group(entities, f"{content.name}, {category}").items():
                    where = f"{content.name}, {category}, {entity}"
                    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
                        raise UserError(f"{where}: found {str(prompts)[:40]!r}, expected a list of prompts")
                    about = {"category": category, "domain": domain, "entity": entity}
                    yield from (("train", {"text": prompt.rstrip(), **about}) for prompt in prompts)


def _parsed(content: files.Content):
    try:
        return json.loads(files.decode(content))
    except json.JSONDecodeError as error:
        raise UserError(f"{content.name}, line {error.lineno}: not JSON ({error.msg})") from None


def _group(value, where: str) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{where}: found {type(value).__name__}, expected {{category: {{entity: [prompt, …]}}}}")
    return value
