#!/usr/bin/env python3
"""cubin_budget.py - what each kernel takes of a multiprocessor, compared with cubin_budget.json.

usage: cubin_budget.py [--write] [--arch 80,86,89,90,120]

Compiles kernels/*.cu with nvcc to cubins and reads the ELF files itself: registers, stack, spills (local loads and
stores), static shared memory, and how many tensor-core products (HMMA) and ldmatrix (LDSM) are in the code. Fails when a
kernel takes more registers than its budget, has any stack or spill, or other shared memory, products or ldmatrix than is
written there; --write writes what is found. Without nvcc it says so and exits 77 (skipped)."""

import argparse
import collections
import concurrent.futures
import json
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUDGET = pathlib.Path(__file__).with_name("cubin_budget.json")
ARCHES = ["80", "86", "89", "90", "120"]
HMMA, LDSM, STL, LDL = 0x23C, 0x83B, 0x387, 0x983  # low 12 bits of a SASS instruction, sm_80 to sm_120
REGISTERS, FRAME = 0x2F, 0x11  # attributes of .nv.info


def text_at(data, at):
    return data[at : data.index(b"\0", at)].decode()


def sections(data):
    """name, type, offset, size, link of each section"""
    table = struct.unpack_from("<Q", data, 0x28)[0]
    entry_bytes, count, names = struct.unpack_from("<HHH", data, 0x3A)
    found = []
    for i in range(count):
        name, kind, _, _, offset, size, link = struct.unpack_from("<IIQQQQI", data, table + i * entry_bytes)
        found.append([name, kind, offset, size, link])
    strings = found[names][2]
    return [(text_at(data, strings + name), kind, offset, size, link) for name, kind, offset, size, link in found]


def symbols(data, parts):
    table = next(p for p in parts if p[0] == ".symtab")
    strings = parts[table[4]][2]
    return [text_at(data, strings + struct.unpack_from("<I", data, table[2] + 24 * i)[0]) for i in range(table[3] // 24)]


def attributes(data, parts, names):
    """registers and frame bytes by kernel"""
    found = collections.defaultdict(dict)
    info = next(p for p in parts if p[0] == ".nv.info")
    at, end = info[2], info[2] + info[3]
    while at < end:
        form, attribute, size = struct.unpack_from("<BBH", data, at)
        if form == 4 and attribute in (REGISTERS, FRAME):
            index, value = struct.unpack_from("<II", data, at + 4)
            found[names[index]][attribute] = value
        at += 4 + (size if form == 4 else 0)
    return found


def read_cubin(path):
    data = path.read_bytes()
    parts = sections(data)
    info = attributes(data, parts, symbols(data, parts))
    shared = {p[0][len(".nv.shared.") :]: p[3] for p in parts if p[0].startswith(".nv.shared.")}
    kernels = {}
    for name, _, offset, size, _ in parts:
        if not name.startswith(".text."):
            continue
        name = name[len(".text.") :]
        code = collections.Counter(struct.unpack_from("<Q", data, at)[0] & 0xFFF for at in range(offset, offset + size, 16))
        kernels[name] = {"registers": info[name].get(REGISTERS, 0), "stack": info[name].get(FRAME, 0),
                         "spills": code[STL] + code[LDL], "shared": shared.get(name, 0), "hmma": code[HMMA], "ldsm": code[LDSM]}
    return kernels


def readable(names):
    """_ZN45_GLOBAL__N__..flash_kernelILi128EE.. as flash_kernel<128>"""
    out = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout.split("\n")
    plain = {}
    for name, text in zip(names, out):
        text = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w*::|^void ", "", text)
        depth = 0
        for i, letter in enumerate(text):  # cut the arguments, not brackets of template arguments
            depth += (letter == "<") - (letter == ">")
            if letter == "(" and depth == 0 and i:
                text = text[:i]
                break
        plain[name] = text
    return plain


def compile_one(source, arch, folder):
    target = folder / f"{source.stem}.{arch}.cubin"
    subprocess.run(["nvcc", "-std=c++20", "-O3", "-cubin", f"-arch=sm_{arch}", "-I", ROOT / "kernels", "-o", target, source], check=True)
    kernels = read_cubin(target)
    plain = readable(list(kernels))
    return arch, {f"{source.name}: {plain[k]}": v for k, v in kernels.items()}


def compare(found, budget):
    problems = []
    for arch, kernels in found.items():
        wanted = budget.get(arch, {})
        for name, k in kernels.items():
            where = f"sm_{arch} {name}"
            if name not in wanted:
                problems.append(f"{where}: not in {BUDGET.name}; --write adds it")
                continue
            w = wanted[name]
            if k["registers"] > w["registers"]:
                problems.append(f"{where}: {k['registers']} registers, budget {w['registers']}")
            problems += [f"{where}: {k[word]} {word}, accepted: none" for word in ("stack", "spills") if k[word]]
            problems += [f"{where}: {word} {k[word]}, budget {w[word]}" for word in ("shared", "hmma", "ldsm") if k[word] != w[word]]
        problems += [f"sm_{arch} {name}: in {BUDGET.name}, not in the code" for name in wanted if name not in kernels]
    return problems


def write(found):
    """a line per kernel, so that a change is a line in the diff"""
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    budget.update(found)
    arches = []
    for arch in sorted(budget, key=int):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(budget[arch][name])}" for name in sorted(budget[arch]))
        arches.append(f' "{arch}": {{\n{lines}\n }}')
    BUDGET.write_text("{\n" + ",\n".join(arches) + "\n}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write what is found")
    parser.add_argument("--arch", default=",".join(ARCHES))
    options = parser.parse_args()
    if not shutil.which("nvcc"):
        print("cubin_budget: no nvcc here, nothing compared")
        return 77
    found = collections.defaultdict(dict)
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(compile_one, source, arch, pathlib.Path(folder))
                for arch in options.arch.split(",") for source in sorted((ROOT / "kernels").glob("*.cu"))]
        for job in jobs:
            arch, kernels = job.result()
            found[arch].update(kernels)
    if options.write:
        write(found)
    problems = compare(found, json.loads(BUDGET.read_text()))
    print("\n".join(problems) or f"cubin_budget: {sum(map(len, found.values()))} kernels within their budgets, no spills")
    return 1 if problems else 0


sys.exit(main())
