"""Random schemas and expressions through the real server: what comes back is valid by independent validators."""

import ast
import json
import random
import re
import unittest

import grpc
import jsonschema

import server_fixture

WORDS = ["name", "age", "x", "tags", "a b", "é"]


def random_schema(rng, depth=0):
    kinds = ["integer", "string", "boolean", "null", "number", "enum", "const"]
    if depth < 3:
        kinds += ["object", "object", "array", "anyOf", "ref"]
    kind = rng.choice(kinds)
    if kind == "integer":
        schema = {"type": kind}
        if rng.random() < 0.6:
            low = rng.randint(-2000, 2000)
            schema["minimum"] = low
            schema["maximum"] = low + rng.randint(0, 3000)
        return schema
    if kind == "string":
        return rng.choice([
            {"type": kind, "maxLength": rng.randint(0, 12)},
            {"type": kind, "minLength": 2, "maxLength": 9},
            {"type": kind, "pattern": "^" + random_regex(rng, 1, json_safe=True) + "$"},
        ])
    if kind == "enum":
        return {"enum": rng.sample([1, -2.5, "a", "b\n\"", None, True, [1, 2], {"k": "v"}], rng.randint(1, 4))}
    if kind == "const":
        return {"const": rng.choice(["x", 7, None, False])}
    if kind == "object":
        names = rng.sample(WORDS, rng.randint(1, 3))
        return {"type": kind, "properties": {name: random_schema(rng, depth + 1) for name in names},
                "required": rng.sample(names, rng.randint(0, len(names))), "additionalProperties": False}
    if kind == "array":
        return {"type": kind, "items": random_schema(rng, depth + 1), "minItems": rng.randint(0, 1), "maxItems": 2}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]}
    if kind == "ref":
        return {"$ref": "#/$defs/shared"}
    return {"type": kind}


def random_regex(rng, depth=0, json_safe=False):
    atoms = ["a", "xy", "[0-9]", "[^a-z\\s]" if not json_safe else "[A-Z]", "\\d\\d", "é", "(?:foo|bar)", "\\.", "[b-d_]"]
    pieces = []
    for _ in range(rng.randint(1, 4)):
        piece = rng.choice(atoms)
        if depth < 2 and rng.random() < 0.3:
            piece = "(?:" + random_regex(rng, depth + 1, json_safe) + "|" + random_regex(rng, depth + 1, json_safe) + ")"
        elif len(piece) > 1 and piece[0] not in "([\\":
            piece = "(?:" + piece + ")"
        pieces.append(piece + rng.choice(["", "", "?", "{2}", "{1,3}"]))
    return "".join(pieces)


class StructuredOutputTest(server_fixture.ServerTestCase):

    flags = ("--http-port", "0")

    def generate(self, kind, value, seed, max_tokens=400):
        request = self.native.message("minitron.v1.GenerateRequest")()
        request.task.text = "Once"
        request.task.sampling.seed = seed
        request.task.sampling.temperature = 1.0
        request.task.stopping.max_tokens = max_tokens
        setattr(request.task.constraint, kind, value)
        sequence = self.native.call("minitron.v1.GenerationService", "Generate", request).sequences[0]
        return sequence.text, sequence.finished.reason == 1

    def test_every_answer_to_250_random_schemas_is_valid(self):
        rng = random.Random(1)
        num_valid = cut = 0
        while num_valid < 250:
            schema = random_schema(rng)
            schema["$defs"] = {"shared": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}}
            text, complete = self.generate("json_schema", json.dumps(schema), seed=num_valid)
            if not complete:  # a number or a list may be longer than there was room
                cut += 1
                self.assertLess(cut, 10)
                continue
            num_valid += 1
            jsonschema.validate(json.loads(text), schema)

    def test_every_answer_to_250_random_expressions_matches(self):
        rng = random.Random(2)
        num_matched = num_refused = 0
        while num_matched < 250:
            regex = random_regex(rng)
            try:
                text, complete = self.generate("regex", regex, seed=num_matched)
            except grpc.RpcError as error:  # nested repetitions may pass the limit, and nothing else may happen
                self.assertIn("needs more than 4096 states", error.details())
                num_refused += 1
                self.assertLess(num_refused, 25)
                continue
            num_matched += 1
            self.assertTrue(complete, regex)
            self.assertIsNotNone(re.fullmatch(regex, text), f"{regex} gave {text!r}")

    def test_a_grammar_of_arithmetic_gives_arithmetic(self):
        grammar = '''root ::= sum
            sum ::= sum [+-] product | product   # left recursion, as grammars of arithmetic have it
            product ::= product "*" atom | atom
            atom ::= [1-9] [0-9]{0,2} | "(" sum ")"'''
        num_complete = num_nested = 0
        for seed in range(30):
            text, complete = self.generate("grammar", grammar, seed, max_tokens=60)
            self.assertRegex(text, r"^[0-9()+*-]+$")
            if complete:
                num_complete += 1
                num_nested += "(" in text
                ast.parse(text, mode="eval")
        self.assertGreater(num_complete, 10)
        self.assertGreater(num_nested, 0)

    def test_a_grammar_of_json_gives_json(self):
        grammar = r'''root ::= value
            value ::= object | array | string | number | "true" | "false" | "null"
            object ::= "{" (member ("," member)*)? "}"
            member ::= string ":" value
            array ::= "[" (value ("," value)*)? "]"
            string ::= "\"" ([^"\\\x00-\x1f] | "\\" (["\\/bfnrt] | "u" [0-9a-f]{4})){0,8} "\""
            number ::= "-"? ("0" | [1-9] [0-9]{0,4}) ("." [0-9]{1,3})?'''
        num_complete = 0
        for seed in range(30):
            text, complete = self.generate("grammar", grammar, seed, max_tokens=100)
            if complete:
                num_complete += 1
                json.loads(text)
        self.assertGreater(num_complete, 10)

    def test_bombs_are_refused_and_the_server_goes_on(self):
        nested = {"type": "integer"}
        for _ in range(12):
            nested = {"type": "array", "items": nested, "minItems": 9}
        for kind, value in [("regex", "((((a{100}){100}){100}){100}){100}"), ("regex", "(.*a){30}.{20}b"),
                            ("regex", "(a|b)*a(a|b){14}"), ("regex", "(" * 2000 + ")" * 2000),
                            ("grammar", "root ::= ((((\"a\"{100}){100}){100}){100}){100}"), ("grammar", "root ::= a"),
                            ("json_schema", json.dumps(nested)), ("json_schema", "[" * 60000),
                            ("json_schema", json.dumps({"type": "string", "maxLength": 10000}))]:
            with self.assertRaises(grpc.RpcError) as caught:
                self.generate(kind, value, 1)
            self.assertEqual(caught.exception.code(), grpc.StatusCode.INVALID_ARGUMENT, value[:40])
            self.assertIn("constraint." + kind, caught.exception.details())
        self.assertEqual(self.generate("regex", "ok", 1), ("ok", True))


if __name__ == "__main__":
    unittest.main()
