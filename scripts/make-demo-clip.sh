#!/bin/sh
# Makes the media clip of the sample live origin: src/demo/assets/{360p,180p,audio}/.
#
# Needs ffmpeg (5.1 or later, with libx264) and nothing else: the picture and the tone are
# synthetic, so there is no footage to license, no font to install and nothing to fetch.
# Run it anywhere; the same ffmpeg and libx264 give the same bytes on every run. The result is
# committed, so that a build needs no ffmpeg: run this only to change the clip, then `cargo test`.
#
# What src/demo/ relies on (its tests check each point against the files):
#   * one loop is 24 s = 12 segments of 2 s; video is 50 frames a segment at 25 fps and
#     512 ticks of 1/12800 s a frame; audio is 1125 AAC frames of 1024 samples at 48 kHz,
#     shared out as 94, 94, 94, 93 (three times);
#   * every video segment opens with an IDR picture, and there are no B-frames, so decode order
#     is display order and no edit list is needed;
#   * one moof and one mdat a segment, a 64-bit tfdt, no sidx: only two numbers change when the
#     origin serves a segment again one loop later.
#
# Deliberately absent: an index file (durations are arithmetic) and a playlist (the origin writes
# its own).
set -eu

fps=25
segment_frames=50
segments=12
loop_secs=24
audio_loop_frames=1125
size_limit_bytes=700000

root=$(cd "$(dirname "$0")/.." && pwd)
assets=$root/src/demo/assets
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

ff() {
    ffmpeg -hide_banner -nostdin -v error -y -filter_threads 1 -filter_complex_threads 1 "$@"
}

# Writes init.mp4 and 00.m4s, 01.m4s ... to $work/$1; the other arguments are the stream to cut.
cut_to_segments() {
    rendition=$1
    shift
    mkdir -p "$work/$rendition"
    ff "$@" -map_metadata -1 -fflags +bitexact \
        -f hls -hls_time 2 -hls_list_size 0 -hls_playlist_type vod -hls_segment_type fmp4 \
        -hls_segment_options movflags=+cmaf+skip_sidx:use_editlist=0 \
        -hls_fmp4_init_filename init.mp4 -hls_segment_filename "$work/$rendition/%02d.m4s" \
        "$work/$rendition/index.m3u8"
    rm "$work/$rendition/index.m3u8"
}

# The picture: testsrc2 (its noise patch is costly, so a panel covers it) with two marks on the
# panel: the white one sweeps once a segment, the orange one steps once a segment and crosses the
# panel once a loop. A stalled, repeated or skipped segment can be seen with the naked eye.
card="testsrc2=size=640x360:rate=$fps[card];
color=black:size=176x96:rate=$fps[panel];
color=white:size=8x40:rate=$fps[sweep];
color=orange:size=8x24:rate=$fps[step];
[card][panel]overlay=x=392:y=216[a];
[a][sweep]overlay=x='400+mod(n,$segment_frames)*152/($segment_frames-1)':y=222:eval=frame[b];
[b][step]overlay=x='400+floor(n/$segment_frames)*152/($segments-1)':y=280:eval=frame,hue=s=0.7"
bt709="out_color_matrix=bt709:out_range=tv,format=yuv420p,\
setparams=range=tv:color_primaries=bt709:color_trc=bt709:colorspace=bt709"

# Arguments: rendition, size, H.264 level, constant rate factor.
# filter_units drops libx264's settings (an SEI message of 700 bytes) from the first picture.
make_video() {
    ff -filter_complex "$card,scale=$2:flags=area:$bt709" -t "$loop_secs" \
        -c:v libx264 -preset slower -profile:v main -level:v "$3" -crf "$4" -threads 1 -bf 0 \
        -g "$segment_frames" -keyint_min "$segment_frames" -sc_threshold 0 \
        -flags +bitexact+cgop -bsf:v filter_units=remove_types=6 \
        -f mp4 "$work/$1.mp4"
    cut_to_segments "$1" -i "$work/$1.mp4" -c copy
}

# The sound: a quiet drone of whole-numbered frequencies and a blip on every second, higher at
# the start of each segment; all of it repeats exactly every 24 s. Three loops are encoded and the
# middle one is kept, so that its first frame already overlaps the end of the loop before it: the
# join is inaudible. Frame 0 of the encoder is priming, hence the `1 +`. There is nothing above
# 4 kHz, so the bits are spent below it.
make_audio() {
    first=$((1 + audio_loop_frames))
    end=$((first + audio_loop_frames))
    blip="exp(-9*mod(t,1))*sin(2*PI*if(lt(mod(t,2),1),1320,880)*t)"
    ff -f lavfi -i "aevalsrc='0.05*sin(2*PI*110*t)+0.04*sin(2*PI*165*t)+0.12*$blip':s=48000" \
        -t $((3 * loop_secs)) -c:a aac -aac_coder fast -b:a 32k -cutoff 4000 -ac 1 -flags +bitexact -f adts "$work/audio.aac"
    cut_to_segments audio -i "$work/audio.aac" -c copy \
        -bsf:a "noise=drop='lt(n,$first)+gte(n,$end)',setts=ts=N*1024:duration=1024:time_base=1/48000,aac_adtstoasc"
}

make_video 360p 640:360 3.0 32
make_video 180p 320:180 1.3 33
make_audio

for rendition in 360p 180p audio; do
    count=$(find "$work/$rendition" -name '*.m4s' | wc -l)
    if [ "$count" -ne "$segments" ]; then
        echo "make-demo-clip: $rendition has $count segments, not $segments" >&2
        exit 1
    fi
done
bytes=$(cat "$work"/360p/* "$work"/180p/* "$work"/audio/* | wc -c)
if [ "$bytes" -ge "$size_limit_bytes" ]; then
    echo "make-demo-clip: $bytes bytes, over the limit of $size_limit_bytes" >&2
    exit 1
fi

for rendition in 360p 180p audio; do
    rm -rf "${assets:?}/$rendition"
    mkdir -p "$assets/$rendition"
    cp "$work/$rendition"/* "$assets/$rendition/"
done
echo "make-demo-clip: $bytes bytes in $assets"
