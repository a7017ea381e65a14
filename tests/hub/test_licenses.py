"""What the licenses of bases ask for, as their texts say it, as warnings; private where access is gated."""

import pytest

from conversion.hub.licenses import license_warnings, llama_terms, private_reason


# Quoted from section 1.b of each text: words to display, how names begin, the model that the Notice names.
TEXTS = {
    "llama2": (None, None, "Llama 2"),
    "llama3": ("Built with Meta Llama 3", "Llama 3", "Meta Llama 3"),
    "llama3.1": ("Built with Llama", "Llama", "Llama 3.1"),
    "llama3.2": ("Built with Llama", "Llama", "Llama 3.2"),
    "llama3.3": ("Built with Llama", "Llama", "Llama 3.3"),
    "llama4": ("Built with Llama", "Llama", "Llama 4"),
}
COMPLETE = ["LICENSE.txt", "NOTICE", "USE_POLICY.md", "config.json"]


@pytest.mark.parametrize("license", TEXTS)
def test_terms_are_those_of_the_text(license):
    built_with, name_start, model = TEXTS[license]
    terms = llama_terms({"license": license})
    assert (terms.built_with, terms.name_start) == (built_with, name_start)
    assert terms.notice.startswith(f"{model} is licensed under the ") and "Meta Platforms, Inc." in terms.notice


@pytest.mark.parametrize("name", ["llama-3.2", "Llama3.2", "llama3.2-community", "Meta Llama 3", "llama-2"])
def test_terms_are_found_by_license_name(name):
    terms = llama_terms({"license": "other", "license_name": name})
    assert terms is not None and terms.license.endswith("Community License")


@pytest.mark.parametrize(
    ("head", "license"),
    [
        (" LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n", "Llama 3.1 Community License"),
        ("**LLAMA 3.3 COMMUNITY LICENSE AGREEMENT**\n", "Llama 3.3 Community License"),
        ("LLAMA 2 COMMUNITY LICENSE AGREEMENT\t\n", "LLAMA 2 Community License"),
        ("META LLAMA 3 COMMUNITY LICENSE AGREEMENT\n", "Meta Llama 3 Community License"),
    ],
)
def test_terms_are_found_by_the_text_where_no_card_says(tmp_path, head, license):
    (tmp_path / "LICENSE").write_text(head + "terms")
    assert llama_terms({}, tmp_path).license == license
    assert llama_terms({"license": "apache-2.0"}, tmp_path) is None, "the card comes first"


@pytest.mark.parametrize("license", ["apache-2.0", "mit", "gemma", "other", None, "llama5"])
def test_other_licenses_have_no_terms_of_metas(license):
    assert llama_terms({"license": license}) is None


@pytest.mark.parametrize(
    ("metadata", "base"),
    [
        ({"license": "llama3.2"}, None),
        ({"license": "llama2"}, None),
        ({"license": "gemma"}, None),
        ({"license": "other", "license_name": "gemma-terms-of-use"}, None),
        ({"license": "other", "license_name": "llama3.1"}, None),
        ({"license": "other"}, None),
        ({}, "meta-llama/Llama-3.2-1B"),
    ],
)
def test_gated_bases_are_private_with_a_reason(metadata, base):
    assert private_reason(metadata, llama_terms(metadata), base)


@pytest.mark.parametrize("metadata", [{"license": "apache-2.0"}, {"license": "mit"}, {}])
def test_open_bases_are_not_private(metadata):
    assert private_reason(metadata, llama_terms(metadata), "someone/model") is None


def test_nothing_is_warned_of_where_nothing_lacks():
    for name in ("me/Llama-3-diff", "me/Llama-3.2-1B-diff-v2"):
        for license in ("llama3", "llama3.2"):
            metadata = {"license": license}
            assert license_warnings(metadata, llama_terms(metadata), COMPLETE, name) == []
    assert license_warnings({"license": "mit"}, None, ["config.json"], "me/x") == []


def test_each_lack_is_a_warning():
    metadata = {"license": "llama3"}
    warnings = license_warnings(metadata, llama_terms(metadata), ["config.json"], "me/diff-llama")
    assert [any(word in warning for warning in warnings) for word in ("copy of itself", "Notice", "'Llama 3'")] == [
        True
    ] * 3
    assert len(warnings) == 3
    assert "states no license" in license_warnings({}, None, COMPLETE, "me/x")[0]
