package clock

import (
	"fmt"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// rtcPath is the hardware clock.
const rtcPath = "/dev/rtc0"

// system is the clock of the machine that this program runs on.
type system struct{ log *slog.Logger }

// System returns the clock of this machine. Changing it needs CAP_SYS_TIME.
func System(log *slog.Logger) Kernel { return system{log: log} }

// Now implements Kernel.
func (system) Now() time.Time { return time.Now() }

// Slew implements Kernel by adjtimex(2), in its old form that slews at 500
// parts per million and leaves the frequency alone.
func (system) Slew(correction time.Duration) error {
	tx := unix.Timex{Modes: unix.ADJ_OFFSET_SINGLESHOT, Offset: correction.Microseconds()}
	if _, err := unix.Adjtimex(&tx); err != nil {
		return fmt.Errorf("adjtimex: %w", err)
	}
	return nil
}

// Step implements Kernel by clock_settime(2), which also makes the kernel
// forget a slew.
func (s system) Step(t time.Time) error {
	ts := unix.NsecToTimespec(t.UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return fmt.Errorf("clock_settime: %w", err)
	}
	return nil
}

// Keep implements Kernel. Some machines have no hardware clock.
func (s system) Keep(t time.Time) {
	if err := setRTC(t); err != nil {
		s.log.Debug("hardware clock not set", "err", err)
	}
}

func setRTC(t time.Time) error {
	f, err := os.OpenFile(rtcPath, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	rtc := rtcTime(t)
	if err := unix.IoctlSetRTCTime(int(f.Fd()), &rtc); err != nil {
		return &os.PathError{Op: "set time of", Path: rtcPath, Err: err}
	}
	return nil
}

// rtcTime returns t as the hardware clock keeps it: UTC, to the nearest second.
func rtcTime(t time.Time) unix.RTCTime {
	u := t.Round(time.Second).UTC()
	return unix.RTCTime{
		Sec: int32(u.Second()), Min: int32(u.Minute()), Hour: int32(u.Hour()),
		Mday: int32(u.Day()), Mon: int32(u.Month()) - 1, Year: int32(u.Year()) - 1900,
		Wday: int32(u.Weekday()), Yday: int32(u.YearDay()) - 1,
	}
}
