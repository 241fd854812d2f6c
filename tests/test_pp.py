"""extract_features against patches cut by hand; scales, pictures, and what is refused."""

import json

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image as Pillow

from sthisto import images, pp
from sthisto.datasets import synthetic


@pytest.fixture
def bare(section):
    """A section without features, its picture beside it."""
    picture = section.uns.pop("spatial")["synthetic_0"]["images"]["hires"]
    del section.uns["sthisto"], section.obsm["X_histo"]
    return section, picture


@pytest.fixture
def extract(encoder):
    return lambda adata, **options: pp.extract_features(adata, **{"encoder": encoder, **options})


def scale_of(adata, key="X_histo"):
    return adata.uns["sthisto"]["features"][key]["mpp"].tolist()


# --- what is written -------------------------------------------------------------------------------------------------


def test_features_are_those_of_patches_cut_by_hand(bare, extract, encoder):
    section, picture = bare
    extract(section, image=picture, mpp=2.0, patch_um=60.0)
    patches = images.sample_patches(images.open_image(picture), section.obsm["spatial"], 30.0, encoder.input_size)
    assert_array_equal(section.obsm["X_histo"], encoder(patches), strict=True)
    record = section.uns["sthisto"]["features"]["X_histo"]
    assert (record["encoder"], record["patch_um"]) == ("colors", 60.0)
    assert [record[name].tolist() for name in ("sections", "mpp", "image")] == [["section"], [2.0], [""]]


def test_a_patch_is_measured_in_micrometres(bare, extract):
    """The same tissue scanned at twice the resolution has the same features."""
    section, picture = bare
    extract(section, image=picture, mpp=2.0, patch_um=64.0)
    sharp = np.kron(picture, np.ones((2, 2, 1), np.uint8))
    section.obsm["spatial"] = section.obsm["spatial"] * 2
    with pytest.warns(UserWarning, match="1 um/px by mpp=; 2 um/px by features taken earlier"):
        extract(section, image=sharp, mpp=1.0, patch_um=64.0, key_added="X_sharp")
    assert scale_of(section, "X_sharp") == [1.0]
    assert_allclose(section.obsm["X_sharp"], section.obsm["X_histo"], rtol=0.02)


def test_a_small_picture_is_kept_where_there_was_none(bare, extract):
    section, picture = bare
    extract(section, image=picture, pitch_um=100.0)
    kept = section.uns["spatial"]["section"]
    assert_array_equal(kept["images"]["hires"], picture)
    assert kept["scalefactors"]["tissue_hires_scalef"] == 1.0
    assert kept["scalefactors"]["spot_diameter_fullres"] == pytest.approx(0.55 * 50)  # a pitch of 100 um at 2 um/px
    one = section[:1].copy()
    del one.uns["spatial"]
    extract(one, image=np.arange(1000 * 5000, dtype=np.uint8).reshape(1000, 5000), mpp=2.0)
    assert one.uns["spatial"]["section"]["images"]["hires"].shape == (400, 2000, 3)
    assert one.uns["spatial"]["section"]["scalefactors"] == {"tissue_hires_scalef": 0.4}


@pytest.mark.parametrize(("given", "side"), [(0.5, 0.5), (3.0, None)])
def test_a_given_scale_factor_is_never_overwritten(bare, extract, given, side):
    """The image kept for drawing has the given scale, or there is none where the image given is smaller."""
    section, picture = bare
    factors = {"tissue_hires_scalef": given, "spot_diameter_fullres": 27.5}
    section.uns["spatial"] = {"section": {"images": {}, "scalefactors": dict(factors)}}
    extract(section, image=picture, mpp=2.0)
    kept = section.uns["spatial"]["section"]
    assert kept["scalefactors"] == factors
    sizes = {name: image.shape[:2] for name, image in kept["images"].items()}
    assert sizes == ({"hires": tuple(round(side * n) for n in picture.shape[:2])} if side else {})


def test_a_section_with_only_a_small_picture_gets_a_hires_one_and_keeps_its_own(bare, extract):
    section, picture = bare
    small = np.asarray(Pillow.fromarray(picture).resize((picture.shape[1] // 4, picture.shape[0] // 4)))
    factor = small.shape[0] / picture.shape[0]
    factors = {"tissue_lowres_scalef": factor, "spot_diameter_fullres": 31.0}
    section.uns["spatial"] = {"V1": {"images": {"lowres": small}, "scalefactors": factors, "metadata": {"a": "b"}}}
    extract(section, pitch_um=100.0)
    kept = section.uns["spatial"]["V1"]
    assert_array_equal(kept["images"]["lowres"], small)
    assert_array_equal(kept["images"]["hires"], small)
    assert kept["metadata"] == {"a": "b"}
    assert kept["scalefactors"] == {**factors, "tissue_hires_scalef": pytest.approx(factor)}
    assert section.uns["sthisto"]["features"]["X_histo"]["image"].tolist() == ["uns:lowres"]


def test_pictures_in_uns_are_used_at_their_scale(section, extract, encoder):
    entry = section.uns["spatial"]["synthetic_0"]
    full = entry["images"]["hires"]
    half = images.open_image(full).thumbnail(max(full.shape) // 2)
    entry["images"]["lowres"], entry["scalefactors"]["tissue_lowres_scalef"] = half
    extract(section, image="lowres", key_added="X_low")
    wanted = images.sample_patches(
        images.open_image(half[0], scale=half[1]), section.obsm["spatial"], 50.0, encoder.input_size
    )
    assert_allclose(section.obsm["X_low"], encoder(wanted), rtol=1e-3)
    assert_allclose(section.obsm["X_low"], section.obsm["X_histo"], rtol=0.1)
    assert section.uns["sthisto"]["features"]["X_low"]["image"].tolist() == ["uns:lowres"]
    assert section.uns["sthisto"]["features"]["X_histo"]["image"].tolist() == ["uns:hires"]


def test_each_section_has_its_own_picture_and_scale(sections, extract):
    pictures = {name: sections.uns["spatial"][name]["images"]["hires"] for name in ("synthetic_0", "synthetic_1")}
    whole = sections.obsm["X_histo"]
    extract(sections, image=pictures, library_key="library")
    assert_array_equal(sections.obsm["X_histo"], whole)
    for name, picture in pictures.items():
        alone = sections[sections.obs["library"] == name].copy()
        extract(alone, image=picture, library_key="library")
        assert_array_equal(alone.obsm["X_histo"], whole[sections.obs["library"] == name])


def test_a_view_becomes_an_object_of_its_own(section, extract):
    view = section[:50]
    extract(view, key_added="X_new")
    assert not view.is_view
    assert "X_new" in view.obsm
    assert "X_new" not in section.obsm


def test_the_default_encoder_needs_no_download(section):
    few = section[:20].copy()
    pp.extract_features(few)
    assert few.obsm["X_histo"].shape[1] > 6
    assert np.isfinite(few.obsm["X_histo"]).all()


# --- the scale -------------------------------------------------------------------------------------------------------


def test_hexagonal_arrays_are_visium(bare, extract, caplog):
    section, picture = bare
    with pytest.warns(UserWarning, match="a hexagonal array, 50 px apart, taken to be 100 um apart"):
        extract(section.copy(), image=picture)
    random = np.random.default_rng(0)
    section.obs_names = ["".join(random.choice(list("ACGT"), 16)) + "-1" for _ in range(section.n_obs)]
    with caplog.at_level("INFO", logger="sthisto"):
        extract(section, image=picture)  # 10x's barcodes leave no doubt
    assert_allclose(scale_of(section), [2.0], rtol=1e-6)
    assert "a Visium array, 50 px for 100 um" in caplog.text
    row, col = section.obs[["array_row", "array_col"]].to_numpy().T
    half = section[(row % 2 == 0) & ((col - row) // 2 % 2 == 0)].copy()
    del half.uns["sthisto"]
    extract(half, image=picture)  # spots left out double the distances, and the array numbers give it away
    assert_allclose(scale_of(half), [2.0], rtol=1e-6)


def test_square_arrays_are_guessed_aloud(extract):
    section = synthetic(60, n_genes=10, array="square", pitch_um=200.0, mpp=4.0)
    del section.uns["spatial"]["synthetic_0"]["scalefactors"]["microns_per_pixel"]
    with pytest.warns(
        UserWarning, match="a square array, 50 px apart, taken to be 200 um apart. Pass pitch_um= or mpp="
    ):
        extract(section)
    assert_allclose(scale_of(section), [4.0], rtol=1e-6)
    del section.uns["sthisto"]
    extract(section, pitch_um=100.0)
    assert_allclose(scale_of(section), [2.0], rtol=1e-6)
    extract(section, mpp=2.5)  # square arrays come at many pitches
    assert scale_of(section) == [2.5]
    with pytest.raises(ValueError, match=r"5 um/px by mpp=; 2 um/px by pitch_um=100"):
        extract(section, mpp=5.0, pitch_um=100.0)


def test_visium_hd_says_its_scale(extract):
    section = synthetic(60, n_genes=10, array="square", pitch_um=16.0, mpp=0.5)  # no warning, which would be an error
    extract(section)
    assert scale_of(section) == [0.5]
    with pytest.warns(
        UserWarning, match=r"3 um/px by mpp=; 0.5 um/px by scalefactors\['microns_per_pixel'\]; .*mpp= c"
    ):
        extract(section, mpp=3.0)
    assert scale_of(section) == [3.0]


def test_a_scale_that_the_array_contradicts(bare, extract, refuses):
    section, picture = bare
    for options in ({"mpp": 0.5}, {"mpp": 4.0}, {"mpp": 2.0, "pitch_um": 300.0}):
        message = "contradict each other: .* by mpp=; .* Are the coordinates in full-resolution pixels"
        with refuses(section, ValueError, message):
            extract(section, image=picture, **options)
    for options in ({"mpp": 0.0}, {"mpp": -1.0}, {"pitch_um": 0.0}, {"mpp": np.nan}):
        with refuses(section, ValueError, "mpp=.*: a length in um is positive|pitch_um=0: a length in um is positive"):
            extract(section, image=picture, **options)


def test_scattered_spots_say_nothing_of_the_scale(bare, extract, refuses):
    section, picture = bare
    section.obsm["spatial"] = np.random.default_rng(0).uniform(0, 0.9, (100, 2)) * picture.shape[1::-1]
    with refuses(section, ValueError, "scattered spots .100. have no standard pitch .* Pass mpp="):
        extract(section, image=picture)
    extract(section, image=picture, mpp=0.5)
    assert scale_of(section) == [0.5]
    one = section[:1].copy()
    del one.uns["sthisto"]
    with refuses(one, ValueError, "have no standard pitch"):
        extract(one, image=picture, pitch_um=100.0)
    extract(one, image=picture, mpp=0.5)
    assert_array_equal(one.obsm["X_histo"], section.obsm["X_histo"][:1])


# --- what is refused -------------------------------------------------------------------------------------------------


def test_no_coordinates(bare, extract, refuses):
    section, picture = bare
    xy = section.obsm.pop("spatial")
    section.obsm["X_pca"] = xy
    with refuses(section, KeyError, r"obsm\['spatial'\] is missing .found: 'X_pca'.*full-resolution pixels, x then y"):
        extract(section, image=picture)
    stacked = np.column_stack([xy, np.arange(len(xy))])
    for wrong, message in (
        (xy[:, :1], r"expected \(n, 2\)"),
        (xy.astype(str), "not numbers. Convert it: .*astype"),
        (stacked, "has a third column that varies"),
    ):
        section.obsm["spatial"] = wrong
        with refuses(section, ValueError, message):
            extract(section, image=picture)
    section.obsm["spatial"] = np.column_stack([xy, np.zeros(len(xy))])  # a third column of zeros is no third dimension
    extract(section, image=picture, pitch_um=100.0)
    assert section.obsm["X_histo"].shape == (100, 6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_coordinates_that_are_not_finite(bare, extract, refuses, value):
    section, picture = bare
    section.obsm["spatial"][7, 1] = value
    with refuses(section, ValueError, "1 of 100 spots have NaN or infinite coordinates. Drop them"):
        extract(section, image=picture)


def test_spots_at_one_place(bare, extract, refuses):
    section, picture = bare
    section.obsm["spatial"][7] = section.obsm["spatial"][8]
    with refuses(section, ValueError, "1 of 100 spots share their coordinates .* library_key="):
        extract(section, image=picture)


def test_a_hires_image_for_full_resolution_coordinates(bare, extract, refuses):
    section, picture = bare
    small = np.asarray(Pillow.fromarray(picture).resize((picture.shape[1] // 4, picture.shape[0] // 4)))
    with refuses(
        section, ValueError, "of 100 points are outside the image.*such as a hires image. Open it with scale="
    ):
        extract(section, image=small)
    extract(section, image=images.open_image(small, scale=small.shape[0] / picture.shape[0]), pitch_um=100.0)


def test_spots_outside_the_image(bare, extract, refuses):
    section, picture = bare
    section.obsm["spatial"][3] = [-900.0, 10.0]
    with refuses(section, ValueError, "1 of 100 points are outside the image, which is .* wide and .* high"):
        extract(section, image=picture)


def test_rows_and_columns_for_x_and_y(bare, extract, refuses):
    section, picture = bare
    tall = np.full((3 * picture.shape[0], picture.shape[1], 3), 244, np.uint8)
    tall[-picture.shape[0] :] = picture
    section.obsm["spatial"] = (section.obsm["spatial"] + [0, 2 * picture.shape[0]])[:, ::-1].copy()
    with refuses(section, ValueError, r"seems? to be \(row, column\): pass x first"):
        extract(section, image=tall, mpp=2.0)


def test_rows_and_columns_on_a_square_picture(bare, extract, refuses):
    section, picture = bare
    side = 3 * max(picture.shape)
    square = np.full((side, side, 3), 244, np.uint8)
    square[: picture.shape[0], side - picture.shape[1] :] = 120
    section.obsm["spatial"] = (section.obsm["spatial"] + [side - picture.shape[1], 0])[:, ::-1].copy()
    with refuses(section, ValueError, r"on tissue, but .* exchanged: xy seems? to be \(row, column\)"):
        extract(section, image=square, mpp=2.0)


def test_duplicate_names(bare, extract, refuses):
    section, picture = bare
    section.obs_names = ["AAAC-1", "AAAC-1", *section.obs_names[2:]]
    with refuses(section, ValueError, "'AAAC-1' occurs more than once.*obs_names_make_unique"):
        extract(section, image=picture)


def test_broken_files(bare, extract, refuses, tmp_path):
    section, picture = bare
    Pillow.fromarray(picture).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("this is no picture")
    with refuses(section, ValueError, "cut.jpg is truncated: the JPEG has no end"):
        extract(section, image=tmp_path / "cut.jpg")
    with refuses(section, ValueError, "text.jpg starts with b'this is .*: no TIFF, JPEG, PNG or zarr"):
        extract(section, image=str(tmp_path / "text.jpg"))
    with refuses(section, FileNotFoundError, "No image at .*none.jpg; .* holds cut.jpg, text.jpg, whole.jpg"):
        extract(section, image=tmp_path / "none.jpg")
    with refuses(section, TypeError, "found int"):
        extract(section, image=7)


def test_no_picture(bare, extract, refuses):
    bare, _ = bare
    with refuses(
        bare, KeyError, "no image of section 'section' .* .sections: nothing; images of this one: nothing.* Pass image="
    ):
        extract(bare)
    with refuses(bare, KeyError, r"no image 'hires' in uns\['spatial'\]\['section'\]\['images'\] .found: nothing"):
        extract(bare, image="hires")
    bare.uns["spatial"] = {"V1": {"images": {"hires": np.eye(4)}, "scalefactors": {}}}
    with refuses(bare, KeyError, r"holds the image 'hires' but no scalefactors\['tissue_hires_scalef'\]"):
        extract(bare)


def test_pictures_of_other_sections(sections, extract, refuses):
    picture = sections.uns["spatial"]["synthetic_0"]["images"]["hires"]
    with refuses(sections, KeyError, "no entry for section 'synthetic_1' .found: 'synthetic_0'"):
        extract(sections, image={"synthetic_0": picture}, library_key="library")
    with refuses(sections, KeyError, "no column 'slide' in adata.obs"):
        extract(sections, library_key="slide")
    sections.obs["half"] = [None] * 5 + ["a"] * 115
    with refuses(sections, ValueError, "5 rows of adata.obs.'half'. name no section"):
        extract(sections, library_key="half")


def test_sections_without_a_library_key(sections, extract, refuses):
    with refuses(sections, ValueError, r"names 2 sections .'synthetic_0', 'synthetic_1'.* Pass library_key="):
        extract(sections)
    picture = sections.uns.pop("spatial")["synthetic_0"]["images"]["hires"]
    with refuses(sections, ValueError, "numbers that another spot has: several sections .* Pass library_key="):
        extract(sections, image=picture)


def test_bad_options(section, extract, refuses, encoder):
    for options, error, message in [
        ({"key_added": "a/b"}, ValueError, "without '/'"),
        ({"patch_um": 0.0}, ValueError, "patch_um=0.0: the side of the patch in um is positive"),
        ({"encoder": "resnet"}, KeyError, "no encoder 'resnet'. Names are .*handcrafted"),
        ({"encoder": object()}, TypeError, "is no encoder; wrong or absent: name"),
    ]:
        with refuses(section, error, message):
            extract(section, **options)


@pytest.mark.parametrize("answer", [np.zeros((6,)), np.zeros((100, 1)), np.zeros((1, 6)), np.zeros((100, 7))])
def test_an_encoder_that_breaks_its_word(section, refuses, encoder, answer):
    class Wrong(type(encoder)):
        def __call__(self, patches):
            return answer

    with refuses(section, ValueError, r"encoder 'colors' gave features of shape .* expected \(64, 6\)"):
        pp.extract_features(section, Wrong())


# --- real pictures ---------------------------------------------------------------------------------------------------


def test_a_blank_hires_image_is_passed_over(data, extract):
    folder = data("visium_v1_tiny") / "spatial"
    spots = pd.read_csv(folder / "tissue_positions_list.csv", header=None, index_col=0).iloc[::40]
    factors = json.loads((folder / "scalefactors_json.json").read_text())
    pictures = {name: np.asarray(Pillow.open(folder / f"tissue_{name}_image.png")) for name in ("hires", "lowres")}
    section = AnnData(obs=pd.DataFrame(index=spots.index), obsm={"spatial": spots.iloc[:, [4, 3]].to_numpy()})
    section.uns["spatial"] = {"tiny": {"images": pictures, "scalefactors": factors}}
    with pytest.warns(UserWarning, match="the 'hires' image of section 'tiny' is blank and was passed over"):
        extract(section, mpp=100 / (factors["spot_diameter_fullres"] * 100 / 55))
    assert section.uns["sthisto"]["features"]["X_histo"]["image"].tolist() == ["uns:lowres"]
    assert section.obsm["X_histo"].std(axis=0).min() > 0
    assert_array_equal(section.uns["spatial"]["tiny"]["images"]["hires"], pictures["hires"])
