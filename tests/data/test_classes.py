"""Class names of data sets and of classifiers."""

import re

import pytest

from videopure_fast.data.classes import match_classes


@pytest.mark.parametrize(
    "classes, names, expected",
    [
        (["a", "b"], ["a", "b"], (0, 1)),
        (["ApplyEyeMakeup", "HandstandPushups"], ["HandstandPushups", "ApplyEyeMakeup"], (1, 0)),
        (["ApplyEyeMakeup", "HandstandPushups"], ["handstand_pushups", "apply eye makeup"], (1, 0)),
        (["c-d", "A B", "e_f"], ["a_b", "E F", "C D"], (2, 0, 1)),
        (["petting_animal_(not_cat)"], ["abseiling", "petting animal (not cat)"], (1,)),
        (["massaging persons head"], ["x", "y", "massaging person’s head"], (2,)),
        (["Pushing something"], ["Pushing [something]", "z"], (0,)),
        (["Déjà  vu", "STRASSE"], ["straße", "de\u0301ja\u0300 vu"], (1, 0)),
        (["a b", "a_b"], ["a_b", "a b"], (1, 0)),  # equal but for the blank, and both are there
        (["0", "1", "10", "2"], [str(i) for i in range(11)], (0, 1, 10, 2)),  # folders in alphabetical order
        (["LABEL_1", "LABEL_0"], ["LABEL_0", "LABEL_1"], (1, 0)),
        (["की", "का"], ["का", "की"], (1, 0)),  # differ in a vowel sign alone
        (["a", "b"], ["LABEL_0", "LABEL_1"], None),
        (["a", "b"], ["0", "1"], None),
        (["0", "1"], ["archery", "bowling"], None),
        (["a", "b"], ["class 0", "class 1"], None),
    ],
)
def test_labels_of_classes(classes, names, expected):
    assert match_classes(classes, names) == expected


@pytest.mark.parametrize(
    "classes, names, message",
    [
        (
            ["archery", "bowling", "curling"],
            ["archery", "biking"],
            "label 1 of the data set, 'bowling', is none of the classifier's classes (its label 1 is 'biking'); "
            "1 of the data set's 3 classes are among the classifier's 2; accepted: equal names in any order",
        ),
        (
            ["a", "b", "c"],
            ["b", "a"],
            "label 2 of the data set, 'c', is none of the classifier's classes (it has no such",
        ),
        (["0", "1", "10", "2"], ["a", "b", "c", "d"], "label 0 of the data set, '0', is none"),  # no plain numbers
        (["a", "LABEL_1"], ["x", "y"], "label 0 of the data set, 'a'"),
        (["A B"], ["a b", "a_b"], "the classifier's 'a b' and 'a_b' both fit the class 'A B'"),
        (["a"], ["a", "a"], "the classifier's 'a' and 'a' both fit the class 'a'"),
        (["a b", "a_b"], ["A-B", "c"], "the classes 'a b' and 'a_b' both fit the classifier's 'A-B'"),
        (["का"], ["की"], "'का', is none"),
    ],
)
def test_names_that_do_not_fit_are_refused(classes, names, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        match_classes(classes, names)
