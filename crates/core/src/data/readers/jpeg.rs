//! Decodes JPEG files, and reports damage instead of hiding it.
//!
//! The `image` crate always decodes in zune-jpeg's lenient mode, in which the missing part of a
//! truncated file becomes grey. zune-jpeg's strict mode reports damage within the image data, but
//! not every truncation: the last rows may be complete without the end marker.

use image::{DynamicImage, GrayImage, RgbImage};
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

/// Decodes a file with at most this many pixels on a side, and bytes in memory.
pub(super) fn decode(bytes: &[u8], max_side: u32, max_memory: u64) -> Result<DynamicImage, String> {
    if !has_end(bytes) {
        return Err(format!(
            "the JPEG file of {} bytes has no end marker: it is cut off or damaged",
            bytes.len()
        ));
    }
    let side = max_side as usize;
    let options = DecoderOptions::default().set_strict_mode(true).set_max_width(side).set_max_height(side);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    let damaged = |error| format!("the JPEG file is damaged: {error}");
    decoder.decode_headers().map_err(damaged)?;
    let (width, height) = decoder.dimensions().ok_or("the JPEG file has no size")?;
    let grey = decoder.input_colorspace() == Some(ColorSpace::Luma);
    let (colours, channels) = if grey { (ColorSpace::Luma, 1) } else { (ColorSpace::RGB, 3) };
    let size = width * height * channels;
    if size as u64 > max_memory {
        return Err(format!("{width} by {height} pixels are beyond the limit of {max_memory} bytes"));
    }
    decoder.set_options(options.jpeg_set_out_colorspace(colours));
    let pixels = decoder.decode().map_err(damaged)?;
    let (width, height) = (width as u32, height as u32);
    let image = if grey {
        GrayImage::from_raw(width, height, pixels).map(DynamicImage::from)
    } else {
        RgbImage::from_raw(width, height, pixels).map(DynamicImage::from)
    };
    image.ok_or_else(|| format!("the JPEG file has fewer pixels than {width} by {height}"))
}

/// Whether the segments of a file lead to its end marker (ITU T.81, B.1.1).
///
/// Segments are skipped by their length, so that the end marker of a thumbnail does not count. In
/// image data, a zero follows each byte that looks like the start of a marker.
fn has_end(bytes: &[u8]) -> bool {
    const STUFFED: u8 = 0;
    const END: u8 = 0xd9;
    let mut at = 0;
    loop {
        let rest = bytes.get(at..).unwrap_or_default();
        let Some(start) = rest.iter().position(|&byte| byte == 0xff) else { return false };
        let Some(code) = rest[start..].iter().position(|&byte| byte != 0xff) else { return false };
        let marker = rest[start + code];
        at += start + code + 1;
        match marker {
            END => return true,
            // These markers have no length: TEM, RST0 to RST7, SOI.
            STUFFED | 0x01 | 0xd0..=0xd8 => {}
            _ => match bytes.get(at..at + 2) {
                Some(&[high, low]) => at += usize::from(u16::from_be_bytes([high, low])).max(2),
                _ => return false,
            },
        }
    }
}
