"""Write artifacts/prebuilt: every checkpoint of the zoo in NF4.

python tests/helpers/make_prebuilt.py
"""

from __future__ import annotations

from pathlib import Path

from vlmbuild.cli.output import quiet_libraries

PREBUILT = Path(__file__).parents[2] / "artifacts" / "prebuilt"
ROLES = ("language", "vision", "projector")


def main() -> None:
    quiet_libraries()
    import vlmbuild
    from vlmbuild.zoo import ZOO

    recipe = vlmbuild.Recipe(quantize=vlmbuild.QuantSpec("nf4", roles=ROLES))
    for name in ZOO:
        built = vlmbuild.build(name, PREBUILT / f"{name}-nf4", recipe, overwrite=True)
        print(f"{built.path.name}: {built.manifest.id}")


if __name__ == "__main__":
    main()
